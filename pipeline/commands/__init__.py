"""The commands of the CLI, one file a family; imported when a command of it is used."""
