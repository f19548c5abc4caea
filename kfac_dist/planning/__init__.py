"""Before training: what a configuration will do and take."""
