"""Data only: what patchmill knows of each encoder, one YAML file each."""
