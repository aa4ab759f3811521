"""Optional packages: imported where they are used, with an error that says what to install."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Around an import: names the package that is missing, and the extra of gohgraph that brings it.

    Example:
        >>> with needs("heads", "attention"):
        ...     import no_such_package
        Traceback (most recent call last):
        ImportError: Expected heads (got: No module named 'no_such_package'). Do pip install 'gohgraph[attention]'.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"Expected {package} (got: {error}). Do pip install 'gohgraph[{extra}]'.") from error
