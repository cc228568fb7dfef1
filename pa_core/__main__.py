"""The command ``pa`` as ``python -m pa_core``."""

from pa_core.cli.app import main

main()
