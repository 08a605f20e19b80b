"""The built-in targets: one .toml file per chip."""

# Inside a checkout `import targets` would make a second copy of this package.
if __name__ != "porter.targets":
    raise ImportError("import porter.targets, not targets")
