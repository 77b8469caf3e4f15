"""What is known of a connection by its socket."""
