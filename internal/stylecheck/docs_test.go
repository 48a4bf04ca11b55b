package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// top is the root of the repository.
const top = "../.."

// developerDocs are the documents in which a name with a dot is Go code, unless
// it is a configuration key.
var developerDocs = []string{"architecture", "failures", "firewall", "glossary", "promises",
	"protocol", "resources"}

var (
	codeSpan = regexp.MustCompile("`([^`\n]+)`")
	testName = regexp.MustCompile(`^(?:([a-z0-9-]+)\.)?((?:Test|Fuzz)[A-Z]\w*)$`)
	goName   = regexp.MustCompile(`^(?:([a-z]+)\.)?([A-Za-z]\w*)\.([A-Za-z]\w*)$`)
	goFile   = regexp.MustCompile(`^[\w/-]+\.go$`)
	folder   = regexp.MustCompile(`^(?:internal|proxy|cmd|routing|tun)/[\w/-]+$`)
	section  = regexp.MustCompile(`(?m)^#? ?\[+(\w+)\]+`)
)

// source is the Go code of the repository.
type source struct {
	tests    map[string]bool
	packages map[string]map[string]bool // declared names by package
	types    map[string]map[string]bool // methods and fields by type, in any package
}

// readSource parses all Go files of the repository.
func readSource(t *testing.T) *source {
	t.Helper()
	s := &source{tests: make(map[string]bool), packages: make(map[string]map[string]bool),
		types: make(map[string]map[string]bool)}
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") || d.Name() == "vendor") && path != top {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		pkg := f.Name.Name
		if pkg == "main" {
			pkg = filepath.Base(filepath.Dir(path))
		}
		for _, d := range f.Decls {
			s.add(strings.TrimSuffix(pkg, "_test"), d)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// add records the names that d declares.
func (s *source) add(pkg string, d ast.Decl) {
	insert := func(m map[string]map[string]bool, key, name string) {
		if m[key] == nil {
			m[key] = make(map[string]bool)
		}
		m[key][name] = true
	}
	switch d := d.(type) {
	case *ast.FuncDecl:
		insert(s.packages, pkg, d.Name.Name)
		s.tests[d.Name.Name] = d.Recv == nil
		if d.Recv != nil {
			insert(s.types, receiver(d.Recv.List[0].Type), d.Name.Name)
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch spec := spec.(type) {
			case *ast.ValueSpec:
				for _, name := range spec.Names {
					insert(s.packages, pkg, name.Name)
				}
			case *ast.TypeSpec:
				insert(s.packages, pkg, spec.Name.Name)
				insert(s.types, spec.Name.Name, "")
				ast.Inspect(spec.Type, func(n ast.Node) bool {
					if field, ok := n.(*ast.Field); ok {
						for _, name := range field.Names {
							insert(s.types, spec.Name.Name, name.Name)
						}
					}
					return true
				})
			}
		}
	}
}

// receiver returns the name of the type of a receiver.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

// declares reports whether before.after is a name of a package, or a method or
// field of a type.
func (s *source) declares(before, after string) bool {
	return s.packages[before][after] || s.types[before][after]
}

// codeSpans returns the code spans of the document path.
func codeSpans(t *testing.T, path string) (spans []string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range codeSpan.FindAllStringSubmatch(string(text), -1) {
		spans = append(spans, m[1])
	}
	return spans
}

// Documents name only tests that exist.
func TestDocsNameTests(t *testing.T) {
	s := readSource(t)
	docs, err := filepath.Glob(top + "/docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatal("no documents", err)
	}
	for _, doc := range docs {
		t.Run(filepath.Base(doc), func(t *testing.T) {
			for _, span := range codeSpans(t, doc) {
				m := testName.FindStringSubmatch(span)
				if m != nil && (!s.tests[m[2]] || m[1] != "" && !s.packages[m[1]][m[2]]) {
					t.Errorf("there is no test %s", span)
				}
			}
		})
	}
}

// The documents for developers name only packages, files, functions, types,
// methods and fields that exist.
func TestDocsNameCode(t *testing.T) {
	s := readSource(t)
	sections := configSections(t)
	for _, name := range developerDocs {
		t.Run(name, func(t *testing.T) {
			for _, span := range codeSpans(t, top+"/docs/"+name+".md") {
				switch m := goName.FindStringSubmatch(span); {
				case testName.MatchString(span):
				case goFile.MatchString(span), folder.MatchString(span):
					if !exists(span) && !exists("internal/"+span) {
						t.Errorf("there is no file %s", span)
					}
				case m == nil || m[1] != "" && s.packages[m[1]] == nil || sections[m[2]]:
					// Sysctls and configuration keys are no Go names.
				case !s.declares(m[2], m[3]):
					t.Errorf("there is no %s", span)
				}
			}
		})
	}
}

// exists reports whether the repository has a file or folder at path.
func exists(path string) bool {
	_, err := os.Stat(filepath.Join(top, path))
	return err == nil
}

// configSections returns the sections of all configuration files.
func configSections(t *testing.T) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(top + "/docs/reference/*.toml")
	if err != nil || len(files) == 0 {
		t.Fatal("no reference", err)
	}
	sections := make(map[string]bool)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range section.FindAllStringSubmatch(string(text), -1) {
			sections[m[1]] = true
		}
	}
	return sections
}
