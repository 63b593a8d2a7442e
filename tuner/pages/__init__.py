"""Self-contained pages: the report of a study and the scoreboard, a module for each group of charts."""
