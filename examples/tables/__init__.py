"""What the example catalogue is made from: product types, brands and queries. All names are invented."""
