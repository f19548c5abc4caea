"""YAML and overrides become validated, frozen objects; knows neither torch nor MPI."""
