"""The leaderboard: models, attacks and defenses, each cell computed once and found by its content."""
