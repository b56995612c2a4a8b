"""Other forms of an erasure, in and out: plain LoRAs, kohya's, DuMo's folders, whole erased models."""
