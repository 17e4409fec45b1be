"""codexd: the spooler that runs the Codex CLI unattended."""

__version__ = "0.1.0"
