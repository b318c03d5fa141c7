"""``python -m transfuse`` is the command ``transfuse``."""

from transfuse.cli import main

main()
