"""Exit statistics: recorded, stored, and what they say of heads and gates."""
