"""What the user wrote: recipe text -> Recipe -> Plan. Pure."""
