"""Model and adapter folders on disk: read, checked, loaded and written."""
