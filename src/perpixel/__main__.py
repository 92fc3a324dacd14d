"""`python -m perpixel`, for launchers that start modules (`torchrun --nproc-per-node=2 -m perpixel train …`)."""

from perpixel.cli import main

main()
