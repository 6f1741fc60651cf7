"""The version of Mycel, stated once: the package, the wheel and the command line all read it here."""

__version__ = "0.1.0"
