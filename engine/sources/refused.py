"""How a reader says that a file is not for it: `open_slide` and `open_volume` then ask the next one."""

__all__ = ["Refused", "Unsupported"]


class Unsupported(Exception):  # noqa: N818 - no failure: another reader takes the file
    """The file is none that this reader decodes exactly; the text says what it lacks."""


class Refused(Unsupported):
    """The file is of the kind that this reader is for, but of none that it decodes exactly."""
