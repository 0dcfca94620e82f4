"""The one place that says which gradjax this is; pyproject.toml reads it here."""

__version__ = "0.1.0"
