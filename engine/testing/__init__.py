"""What a third party needs to prove a new reader or encoder; its modules are imported one by one."""
