"""Operations with several implementations, each held to one reference."""
