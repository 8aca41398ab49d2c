import sys

try:
    from .cli import main
except ImportError as error:  # missing or built for another torch: the message explains the remedy
    print(error, file=sys.stderr)
    sys.exit(2)

sys.exit(main())
