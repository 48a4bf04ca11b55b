package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// ErrNotRunning is returned for calls to an instance that does not run.
var ErrNotRunning = errors.New("not running")

// StatusError is the response to a request that an instance refused.
type StatusError struct {
	Status int // HTTP status code
	Reason string
}

func (e *StatusError) Error() string { return e.Reason }

// maxAnswer is the maximum size in bytes of a response, or of one line of a
// stream.
const maxAnswer = 64 << 20

// Client sends requests to one instance.
type Client struct {
	dir, name string
	http      http.Client
}

// NewClient returns a Client for the instance name. Each call makes a new
// connection.
func NewClient(dir, name string) *Client {
	c := &Client{dir: dir, name: name}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", SocketPath(dir, name))
		},
	}
	return c
}

// Get requests path and decodes the response into v.
func (c *Client) Get(ctx context.Context, path string, v any) error {
	return c.call(ctx, http.MethodGet, path, v)
}

// Post sends a POST request to path and decodes the response into v, unless v
// is nil.
func (c *Client) Post(ctx context.Context, path string, v any) error {
	return c.call(ctx, http.MethodPost, path, v)
}

func (c *Client) call(ctx context.Context, method, path string, v any) error {
	answer, err := c.do(ctx, method, path)
	if err != nil {
		return err
	}
	body := answer.Body
	defer body.Close()
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("%s: reading the answer: %w", c.name, err)
	}
	return nil
}

// Watch requests path and passes each JSON value of the response to each, until
// each returns false. It then returns nil, or io.EOF if the instance ended the
// stream.
func (c *Client) Watch(ctx context.Context, path string, each func(json.RawMessage) bool) error {
	answer, err := c.do(ctx, http.MethodGet, path)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	decoder := json.NewDecoder(answer.Body)
	for {
		var v json.RawMessage
		if err := decoder.Decode(&v); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return io.EOF
		}
		if !each(v) {
			return nil
		}
	}
}

// do returns a successful response.
func (c *Client) do(ctx context.Context, method, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://unix"+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(r)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED), // no process listens
		// The process died before it answered.
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%s: %w", c.name, ErrNotRunning)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: %w", SocketPath(c.dir, c.name), fs.ErrPermission)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%s: %w", c.name, err)
	}
	if response.StatusCode == http.StatusOK {
		return response, nil
	}
	defer response.Body.Close()
	var f failure
	if err := json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(&f); err != nil ||
		f.Error == "" {
		return nil, fmt.Errorf("%s: answered %s", c.name, response.Status)
	}
	if response.StatusCode == http.StatusForbidden {
		return nil, fmt.Errorf("%s: %w", f.Error, fs.ErrPermission)
	}
	return nil, &StatusError{Status: response.StatusCode, Reason: f.Error}
}

// WaitGone waits until no process holds the lock of the instance.
func (c *Client) WaitGone(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if running, err := Running(c.dir, c.name); err != nil || !running {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
