"""What patchmill is measured by: each module is one benchmark, run as `patchmill bench NAME`."""
