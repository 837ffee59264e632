"""Documents, and what draws the pictures in them: `python -m docs.draw_kernels`."""
