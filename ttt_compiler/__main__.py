"""``python -m ttt_compiler`` is the command ``ttt-compiler``. Nothing else may be added here."""

from ttt_compiler.cli import main

main()
