"""`python -m veratune`."""

from veratune.cli import main

raise SystemExit(main())
