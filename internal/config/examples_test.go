package config

import (
	"os"
	"testing"
)

// TestExamples parses the example files of the packages.
func TestExamples(t *testing.T) {
	const dir = "../../packaging/examples/"
	data, err := os.ReadFile(dir + "client.toml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseClient("client.toml", data); err != nil {
		t.Error(err)
	}
	if data, err = os.ReadFile(dir + "proxy.toml"); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseProxy("proxy.toml", data); err != nil {
		t.Error(err)
	}
}
