package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// stateDir is where things are kept that outlast a tunnel, unless --state-dir says otherwise.
const stateDir = "/var/lib/masque"

// installationFile holds a random number that stands for this installation of the client.
const installationFile = "installation"

// installation returns the token by which a proxy knows a tunnel of this host again. Tunnels and proxies do not share it, so that
// proxies cannot tell from it that they have a client in common.
func (o *options) installation(name, proxy string) (string, error) {
	secret, err := readInstallation(o.stateDir)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(bytes.Join([][]byte{secret, []byte(name), []byte(proxy)}, []byte{0}))
	return base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:16]), nil
}

// readInstallation returns what is in the file, which is made if there is none.
func readInstallation(dir string) ([]byte, error) {
	path := filepath.Join(dir, installationFile)
	secret, err := os.ReadFile(path)
	if !errors.Is(err, fs.ErrNotExist) {
		if err == nil && len(bytes.TrimSpace(secret)) < 16 {
			err = fmt.Errorf("%s is damaged: remove it", path)
		}
		return secret, err
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, installationFile+"-") // with 0600
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	secret = []byte(rand.Text() + "\n")
	_, err = f.Write(secret)
	// The service, which runs as the owner of the folder, reads it too.
	if info, statErr := os.Stat(dir); statErr == nil && os.Geteuid() == 0 {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			err = errors.Join(err, f.Chown(int(st.Uid), int(st.Gid)))
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	// Of two that start at once, the first one counts.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return os.ReadFile(path)
}
