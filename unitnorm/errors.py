"""The exceptions that a user is meant to see, each as one line; any other is a defect of ours."""


class UserError(Exception):
    """What the user can mend, in one line: what is wrong, where, what was expected, what to do."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """The user or the system asked to stop, and everything up to there is saved."""


def expect(good: object, where: object, expected: str, found: object) -> None:
    """Raises the `UserError` "where: expected …, found …" unless `good` holds."""
    if not good:
        raise UserError(f"{where}: expected {expected}, found {found}")
