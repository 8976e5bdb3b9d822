"""`python -m chipdeploy.cli`."""

from .main import main

main()
