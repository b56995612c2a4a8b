"""To the Hub and back: transfer, its client, and what lies beside an erasure's files (card, pictures)."""
