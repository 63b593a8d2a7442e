"""Self-contained HTML pages of a study and of a scoreboard, with a module per group of charts."""
