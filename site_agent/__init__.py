"""What runs in a data center: the link (keys, stream, outbox, policy), the trainer, the command."""
