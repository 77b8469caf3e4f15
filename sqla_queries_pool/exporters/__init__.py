"""What the pools do, told to monitoring systems.  Each module needs the library that its extra installs."""
