"""Operations with one implementation: pure functions, no parameters."""
