"""The version of the package, held against that of the compiled library at import."""

__version__ = "0.1.0"
