"""Every failure that porter reports: one sentence, where, a hint, a stable code and an exit code."""


class PorterError(Exception):
    """A failure that the user can act on.

    `code` is stable (`PORT-0123`) and has a page `docs/errors/PORT-0123.md`. `what` is one sentence in
    lower case, `where` a node, tensor or file, `hint` what to try. `exit_code` is the command line's.
    """

    exit_code = 1

    def __init__(self, code: str, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(code, what, where, hint)  # what pickling gives back to __init__, in order
        self.code, self.what, self.where, self.hint = code, what, where, hint

    def __str__(self) -> str:
        where = f" [{self.where}]" if self.where else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.code}: {self.what}{where}{hint}"


class ModelError(PorterError):
    """The model file, or what is in it, is wrong (codes 01xx)."""


class PassError(PorterError):
    """A pass or a pipeline text is wrong, or a pass failed (codes 02xx)."""


class SpecError(PorterError):
    """A target's description is wrong (codes 03xx)."""


class TargetError(PorterError):
    """The port does not fit the target, or cannot be lowered to it (codes 04xx)."""

    exit_code = 4


class BundleError(PorterError):
    """A bundle is missing, damaged or cannot be run (codes 05xx)."""


class DriftError(PorterError):
    """Outputs drifted further than allowed (codes 06xx)."""

    exit_code = 3


class ExportError(PorterError):
    """PyTorch could not be exported (codes 07xx)."""


class OptionError(PorterError):
    """An option, a file named by an option, or the feeds are wrong (codes 08xx)."""


class EnvironmentFailure(PorterError):
    """The machine refused: disk full, no compiler, out of memory, interrupted (codes 09xx)."""
