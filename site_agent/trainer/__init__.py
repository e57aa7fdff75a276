"""The process that trains: task, strategies, torch. It has no key and knows no network."""
