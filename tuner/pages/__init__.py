"""Self-contained pages, of a study and of a scoreboard; a module for each group of charts."""
