"""The contract between the two ends: messages, manifests, chunks, identities, errors."""
