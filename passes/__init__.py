"""The built-in passes: one file each, named by its place (`fuse/rms_norm.py` is `fuse.rms_norm`)."""

# Inside a checkout `import passes` would make a second copy of every pass class.
if __name__ != "porter.passes":
    raise ImportError("import porter.passes, not passes")
