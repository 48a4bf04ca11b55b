// Quicpatch edits the vendored copy of quic-go for use under a tunnel. `make` runs it after `go mod vendor`, from the top of
// the repository. Each edit is of one named declaration and has to be found exactly once in the one version it was made for;
// otherwise nothing is written and the build stops, because an edit that silently does not apply would be worse than none.
//
// Why, and what each edit is worth, is in docs/architecture.md. Code that needs the edits is built with the tag quicpatch.
package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
)

const (
	module  = "github.com/quic-go/quic-go"
	version = "v0.64.1"
)

// edit replaces text in one declaration.
type edit struct {
	name     string // of the edit, for messages
	file     string // in the module
	decl     string // a function, "Type.Method", type, or constant or variable
	from, to string
}

func main() {
	if err := run("."); err != nil {
		fmt.Fprintln(os.Stderr, "quicpatch:", err)
		os.Exit(1)
	}
}

// run applies all edits to the vendored module below the folder top, or none.
func run(top string) error {
	modules, err := os.ReadFile(filepath.Join(top, "vendor", "modules.txt"))
	if err != nil {
		return fmt.Errorf("%w: run `go mod vendor` first", err)
	}
	if !strings.Contains(string(modules), "\n# "+module+" "+version+"\n") && !strings.HasPrefix(string(modules), "# "+module+" "+version+"\n") {
		return fmt.Errorf("the edits are for %s %s, which is not the version in go.mod: look at each of them before changing the version here", module, version)
	}
	root := filepath.Join(top, "vendor", filepath.FromSlash(module))
	changed := make(map[string][]byte)
	var errs []error
	for _, e := range edits {
		path := filepath.Join(root, filepath.FromSlash(e.file))
		src, ok := changed[path]
		if !ok {
			if src, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		if src, err = e.apply(src); err != nil {
			errs = append(errs, fmt.Errorf("%s: %s: %w", e.name, e.file, err))
			continue
		}
		changed[path] = src
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for name, src := range files {
		changed[filepath.Join(root, filepath.FromSlash(name))] = []byte(src)
	}
	for path, src := range changed {
		if err := os.WriteFile(path, src, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// apply returns src with the edit made.
func (e edit) apply(src []byte) ([]byte, error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, e.file, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var found []ast.Node
	for _, d := range file.Decls {
		if node := declaration(d, e.decl); node != nil {
			found = append(found, node)
		}
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%d declarations of %s, want 1", len(found), e.decl)
	}
	start, end := fset.Position(found[0].Pos()).Offset, fset.Position(found[0].End()).Offset
	text := string(src[start:end])
	if n := strings.Count(text, e.from); n != 1 {
		return nil, fmt.Errorf("%s has %q %d times, want 1", e.decl, e.from, n)
	}
	out := append([]byte(nil), src[:start]...)
	out = append(out, strings.Replace(text, e.from, e.to, 1)...)
	return append(out, src[end:]...), nil
}

// declaration returns the part of d that declares name, or nil.
func declaration(d ast.Decl, name string) ast.Node {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if funcName(d) == name {
			return d
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if s.Name.Name == name {
					return s
				}
			case *ast.ValueSpec:
				for _, n := range s.Names {
					if n.Name == name {
						return s
					}
				}
			}
		}
	}
	return nil
}

// funcName is the name of a function, with its receiver's type in front.
func funcName(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return d.Name.Name
	}
	t := d.Recv.List[0].Type
	if p, ok := t.(*ast.StarExpr); ok {
		t = p.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return id.Name + "." + d.Name.Name
	}
	return d.Name.Name
}
