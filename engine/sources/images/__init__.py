"""Image sets: folders, tars and arrays of pictures, behind the protocol `ImageSet`."""
