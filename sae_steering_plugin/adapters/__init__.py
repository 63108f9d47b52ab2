"""The rooms' only doors to other libraries: everything that touches a host object is here."""
