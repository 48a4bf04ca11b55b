package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"masquevpn/internal/connectip"
)

// stateDir is where things are kept that outlast a tunnel, unless --state-dir
// says otherwise.
const stateDir = "/var/lib/masque"

// installationFile holds a random number that stands for this installation of
// the client.
const installationFile = "installation"

// installation returns the token by which a proxy knows a tunnel of this host
// again. Tunnels and proxies do not share it, so that proxies cannot tell from
// it that they have a client in common.
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
	secret, err := readToken(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return secret, err
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, installationFile+"-") // mode 0600
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
	return readToken(path)
}

// instancePath is where a running tunnel keeps its instance token for a next
// one, in case it is killed.
func (o *options) instancePath(name string) string {
	return filepath.Join(o.RunDir,
		name+".instance")
}

// lastInstance returns the instance token of the tunnel's last run, if that did
// not end in good order and its session may so be there still, or a new one.
// The lock of the tunnel sees to it that no two use one; and as the run
// directory does not outlast the host, nor is part of what is copied to another
// one, neither do two hosts.
func (o *options) lastInstance(name string, logger *slog.Logger) string {
	path := o.instancePath(name)
	token, err := readToken(path)
	if err == nil && !connectip.IsToken(string(token)) {
		err = fmt.Errorf("%s is damaged", path)
	}
	switch {
	case err == nil:
		return string(token)
	case !errors.Is(err, fs.ErrNotExist):
		logger.Warn("the proxy may hold the addresses of a run that was killed for half a minute more: its token cannot be used, and a new one is made", "error", err)
	}
	return rand.Text()
}

// minToken is the least number of bytes that nobody guesses.
const minToken = 16

// readToken reads a small file, and neither what a link leads to nor a pipe,
// for which it would wait.
func readToken(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file: remove it", path)
	}
	token, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err == nil && len(bytes.TrimSpace(token)) < minToken {
		err = fmt.Errorf("%s is damaged: remove it", path)
	}
	return token, err
}

// keepInstance writes the token down until forget is called, in good order.
func (o *options) keepInstance(name, token string, logger *slog.Logger) (forget func()) {
	path := o.instancePath(name)
	_ = os.Remove(path) // it may be another user's
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = f.WriteString(token)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		logger.Warn("the proxy will not know this tunnel again if it is killed", "error", err)
	}
	return func() { _ = os.Remove(path) }
}
