"""One video on several GPUs: who holds which tokens and heads, how they are exchanged, and what if a rank fails."""
