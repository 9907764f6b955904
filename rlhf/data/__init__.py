"""Data sets: each one a module with a class that offers `load(split)`, and one YAML in `conf/data`."""
