"""The `mlm` command: the only room that reads gin files and draws on a screen."""
