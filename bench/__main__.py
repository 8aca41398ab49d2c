import sys

try:
    from .cli import main
except ImportError as error:  # no extension, or one for another torch: its message says what to do
    print(error, file=sys.stderr)
    sys.exit(2)

sys.exit(main())
