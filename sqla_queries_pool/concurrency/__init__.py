"""How threads wait, who they are, and the threads that work in the background."""
