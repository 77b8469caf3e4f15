"""What the pools do, for monitoring systems.  Each module needs the library that its extra installs."""
