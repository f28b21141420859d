"""The parent process at work: build, check, race and serve the variants of a recipe, or one model alone."""
